"""From one command line to a run on other machines: what each platform needs, said before done."""
