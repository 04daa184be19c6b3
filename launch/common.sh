# shellcheck shell=bash
# What the scripts of this folder share: messages, help, flags, the training command, running or printing, waiting.
# Sourced, never run. Exit codes are those of the package: 2 for a mistake of the user, 128 + n when signal n ended it.

PROGRAM="$(basename "$0")"
DRY_RUN=''
POLL_SECONDS=15

say() { printf '%s: %s\n' "$PROGRAM" "$1" >&2; }

# fail MESSAGE [EXIT_CODE]: one line on standard error, and the end.
fail() {
    say "error: $1"
    exit "${2:-2}"
}

# Prints the comment at the top of the script that runs.
show_help() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }

# Prints words as one line that a shell reads as the same words.
quoted() {
    local word line=''
    for word in "$@"; do
        if [[ $word =~ ^[-A-Za-z0-9_./:=,@%+]+$ ]]; then line+=" $word"; else line+=" ${word@Q}"; fi
    done
    printf '%s\n' "${line# }"
}

# Runs a command, or with --dry_run prints it.
run() {
    if [[ $DRY_RUN ]]; then quoted "$@"; else "$@"; fi
}

# pause [FACTOR]: sleeps that many polling intervals.
pause() { sleep "$(awk -v seconds="$POLL_SECONDS" -v factor="${1:-1}" 'BEGIN { print seconds * factor }')"; }

now() { date +%s; }

# steady SINCE: whether a run that began then has got over earlier crashes, which then no longer count.
steady() { (($(now) - $1 >= 1800)); }

# patiently ATTEMPTS COMMAND...: until it succeeds, with a pause that doubles up to sixteen intervals.
patiently() {
    local attempts="$1" attempt factor=1
    shift
    for ((attempt = 1; attempt <= attempts; attempt++)); do
        if "$@"; then return 0; fi
        if ((attempt < attempts)); then pause "$factor"; fi
        factor=$((factor < 16 ? factor * 2 : 16))
    done
    return 1
}

needs_program() {
    [[ $DRY_RUN ]] || command -v "$1" >/dev/null || fail "$1 is not installed, or not on PATH; $2"
}

# positive_number FLAG VALUE
positive_number() { [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "--$1=$2: give a whole number of at least 1"; }

# positive_seconds FLAG VALUE: fractions are allowed.
positive_seconds() {
    [[ $2 =~ ^[0-9]*\.?[0-9]+$ && $2 =~ [1-9] ]] || fail "--$1=$2: give a number of seconds above 0"
}

# numbered FLAG VALUE: one of several, counted from 0.
numbered() { [[ $2 =~ ^(0|[1-9][0-9]*)$ ]] || fail "--$1=$2: give a number, the first is 0"; }

# Lower-case names that Cloud TPU, Kubernetes and SLURM all take.
valid_name() {
    [[ $1 =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
        fail "${1:-an empty name}: a name has lower-case letters, digits and hyphens, a letter first, at most 40 in all"
}

# given FLAG VALUE WHAT: a flag that has no default.
given() { [[ $2 ]] || fail "--$1 is missing: give $3; see --help"; }

# environment_variable NAME=VALUE: of a flag --env.
environment_variable() { [[ $1 =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || fail "--env=$1: give NAME=VALUE"; }

# training_arguments WORDS...: what follows `--`, with or without `python -m endistill_jax.main`, into ARGUMENTS.
training_arguments() {
    if [[ ${1:-} == endistill ]]; then
        shift
    elif [[ ${1:-} =~ ^python[0-9.]*$ && ${2:-} == -m && ${3:-} == endistill_jax.main ]]; then
        shift 3
    fi
    ARGUMENTS=("$@")
    local word found=''
    for word in "$@"; do
        if [[ $word == --gin_file=* || $word == --gin_file ]]; then found=yes; fi
    done
    [[ $found ]] ||
        fail 'give the training command after --, such as: -- --gin_file=gin/miniend_3b.gin --gin.MODEL_DIR=...'
}

# needs_known_gin_files WHERE: machines elsewhere have the gin files of the package; of an `image`, absolute paths too.
needs_known_gin_files() {
    local word before='' file checkout
    checkout="$(dirname "$LAUNCH")"
    for word in "${ARGUMENTS[@]}"; do
        file=''
        if [[ $word == --gin_file=* ]]; then file="${word#*=}"; fi
        if [[ $before == --gin_file ]]; then file="$word"; fi
        before="$word"
        [[ ! $file || ($1 == image && $file == /*) || ($file == gin/* && -f $checkout/$file) ]] ||
            fail "--gin_file=$file: the $1 has the files in gin/ of $checkout alone; put it there, and give gin/NAME"
    done
}

# Workers in a cloud share no disk, and lose theirs with the machine.
needs_bucket() {
    local word
    for word in "${ARGUMENTS[@]}"; do
        if [[ $word == --gin.MODEL_DIR=gs://* ]]; then return; fi
    done
    fail 'the training command needs --gin.MODEL_DIR=gs://BUCKET/FOLDER: checkpoints must outlive the machines'
}
