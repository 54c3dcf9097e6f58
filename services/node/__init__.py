"""The machine: supervised processes, devices, memory, runtime directory, walltime, signals."""
