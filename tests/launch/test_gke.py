"""launch/gke_jobset.sh and launch/gke_xpk.sh against a kubectl and an xpk that record what they are given."""

import shlex

import pytest
import yaml

TRAINING = ["--", "--gin_file=gin/miniend_3b.gin", "--gin.MODEL_DIR=gs://bucket/run", "--gin.NAMES=(\"a\\b\", 'c d')"]
JOBSET = ["run", "--topology=v5e:4x8", "--image=registry/image:1"]
XPK = ["run", "--cluster=cluster", "--type=v5e-32", "--image=registry/image:1"]


def manifest(fakes, *words):
    ended = fakes.run("gke_jobset.sh", *JOBSET, *words, *TRAINING)
    assert ended.returncode == 0, ended.stderr
    return yaml.safe_load((fakes.folder / "manifest").read_text())


def pod(jobset):
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def test_each_slice_is_a_job_on_a_node_pool_of_its_own_with_a_pod_a_host(fakes):
    jobset = manifest(fakes, "--slices=3")
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["metadata"]["name"] == "run"
    exclusive = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    assert jobset["metadata"]["annotations"] == exclusive
    [job] = jobset["spec"]["replicatedJobs"]
    assert job["replicas"] == 3
    spec = job["template"]["spec"]
    assert (spec["parallelism"], spec["completions"], spec["completionMode"]) == (8, 8, "Indexed")
    assert pod(jobset)["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x8",
    }
    [container] = pod(jobset)["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["image"] == "registry/image:1"


def test_the_container_runs_the_training_command_unchanged(fakes):
    [container] = pod(manifest(fakes))["containers"]
    assert container["command"] == ["python", "-m", "endistill_jax.main", *TRAINING[1:]]


def test_an_image_may_have_gin_files_of_its_own_by_their_whole_path(fakes):
    assert fakes.run("gke_jobset.sh", *JOBSET, *TRAINING, "--gin_file=/mine/my.gin").returncode == 0


def test_a_mistake_ends_the_run_and_anything_else_starts_it_again(fakes):
    jobset = manifest(fakes, "--max_restarts=7")
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7
    assert [(rule["action"], rule["onJobFailureReasons"]) for rule in policy["rules"]] == [
        ("FailJobSet", ["PodFailurePolicy"])
    ]
    spec = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert pod(jobset)["terminationGracePeriodSeconds"] == 300
    assert spec["backoffLimit"] == 0 and pod(jobset)["restartPolicy"] == "Never"
    assert spec["podFailurePolicy"]["rules"] == [
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2]}}
    ]


def test_spot_machines_are_selected_and_tolerated_only_where_asked_for(fakes):
    assert "tolerations" not in pod(manifest(fakes))
    spot = pod(manifest(fakes, "--spot"))
    assert spot["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    [toleration] = spot["tolerations"]
    assert (toleration["key"], toleration["value"]) == ("cloud.google.com/gke-spot", "true")


def test_dry_run_prints_the_manifest_and_submits_nothing(fakes):
    printed = fakes.run("gke_jobset.sh", *JOBSET, "--spot", "--dry_run", *TRAINING)
    assert fakes.calls == []
    assert yaml.safe_load(printed.stdout) == manifest(fakes, "--spot")
    assert fakes.calls == [["kubectl", "create", "--filename=-"]]


def test_a_jobset_that_exists_is_not_submitted_again(fakes):
    fakes.answer("kubectl", (1, 'Error from server (AlreadyExists): jobsets "run" already exists'))
    ended = fakes.run("gke_jobset.sh", *JOBSET, *TRAINING)
    assert ended.returncode == 1
    assert "kubectl delete jobset run" in ended.stderr.splitlines()[-1]


def test_variables_reach_the_container_unchanged(fakes):
    words = ['--env=LIBTPU_INIT_ARGS=--a=1 --b="c\\d"', "--env=EMPTY=", "--env=LINES=a\n\tb", "--env=NAMES=${IMAGE}$x"]
    [container] = pod(manifest(fakes, *words))["containers"]
    assert container["env"] == [
        {"name": "LIBTPU_INIT_ARGS", "value": '--a=1 --b="c\\d"'},
        {"name": "EMPTY", "value": ""},
        {"name": "LINES", "value": "a\n\tb"},
        {"name": "NAMES", "value": "${IMAGE}$x"},
    ]


def test_hosts_of_several_slices_wait_longer_for_each_other(fakes):
    def variables(*words):
        [container] = pod(manifest(fakes, *words))["containers"]
        return {variable["name"]: variable["value"] for variable in container["env"]}

    assert variables("--slices=2", "--env=A=b") == {"ENDISTILL_CONNECT_SECONDS": "3600", "A": "b"}
    assert variables() == {}


def test_xpk_gets_the_training_command_in_one_flag(fakes):
    words = [*XPK, "--slices=2", "--xpk_flag=--priority=high", *TRAINING]
    assert fakes.run("gke_xpk.sh", *words).returncode == 0
    [call] = fakes.calls
    assert call[:-1] == [
        *["xpk", "workload", "create", "--workload=run", "--cluster=cluster", "--project=project", "--zone=zone"],
        *["--tpu-type=v5litepod-32", "--num-slices=2", "--docker-image=registry/image:1", "--max-restarts=100"],
        *["--termination-grace-period-seconds=300", "--restart-on-exit-codes=1", "--priority=high"],
    ]
    command = shlex.split(call[-1].removeprefix("--command="))
    assert command == ["python", "-m", "endistill_jax.main", *TRAINING[1:]]


def test_dry_run_prints_the_xpk_command_and_submits_nothing(fakes):
    printed = fakes.run("gke_xpk.sh", *XPK, "--dry_run", *TRAINING)
    assert fakes.calls == []
    fakes.run("gke_xpk.sh", *XPK, *TRAINING)
    assert [shlex.split(printed.stdout)] == fakes.calls


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("gke_jobset.sh", ["run", "--image=i", *TRAINING], "--topology is missing"),
        ("gke_jobset.sh", ["run", "--topology=v5e:4x4", *TRAINING], "--image is missing"),
        ("gke_jobset.sh", ["run", "--topology=v9:4x4", "--image=i", *TRAINING], "v4, v5e, v5p or v6e"),
        ("gke_jobset.sh", ["run", "--topology=v5e:16", "--image=i", *TRAINING], "chips by chips"),
        ("gke_jobset.sh", ["run", "--topology=v5e:1x1", "--image=i", *TRAINING], "not a multiple"),
        (
            "gke_jobset.sh",
            ["run", "--topology=v5e:2x2", "--slices=2", "--image=i", *TRAINING],
            "slices of several hosts",
        ),
        ("gke_jobset.sh", [*JOBSET, "--env=A", *TRAINING], "--env=A: give NAME=VALUE"),
        ("gke_jobset.sh", [*JOBSET, "--slice=2", *TRAINING], "unknown flag --slice=2"),
        ("gke_jobset.sh", [*JOBSET, "--", "--gin_file=x"], "--gin.MODEL_DIR=gs://"),
        ("gke_jobset.sh", [*JOBSET, *TRAINING, "--gin_file=my.gin"], "--gin_file=my.gin: the image has the files"),
        ("gke_xpk.sh", [*XPK, *TRAINING, "--gin_file", "gin/my.gin"], "--gin_file=gin/my.gin: the image has"),
        ("gke_xpk.sh", ["run", "--type=v4-8", "--image=i", *TRAINING], "--cluster is missing"),
        ("gke_xpk.sh", [*XPK, "--topology=v5e:4x4", *TRAINING], "unknown flag"),
        ("gke_xpk.sh", XPK, "give the training command after --"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_called(fakes, script, words, message):
    ended = fakes.run(script, *words)
    assert (ended.returncode, ended.stdout, fakes.calls) == (2, "", [])
    assert message in ended.stderr and len(ended.stderr.splitlines()) == 1
