"""SeqIO tasks and mixtures. Importing a module registers what it defines."""
