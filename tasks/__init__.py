"""SeqIO Tasks and Mixtures, installed as `vishwam_t5x_tasks`."""
