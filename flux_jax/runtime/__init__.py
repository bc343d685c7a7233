"""Where programs run: environment, memory, compilation cache, devices that are not there, several processes."""
