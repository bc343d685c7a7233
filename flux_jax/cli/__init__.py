"""The programs: all that speaks of arguments, standard streams and exit status."""
