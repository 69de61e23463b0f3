"""Reading NVIDIA machine code: instructions, loops, pipes, and the budgets that a kernel must keep."""
