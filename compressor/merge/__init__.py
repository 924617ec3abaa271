"""Several fine-tunes of one base become one."""
