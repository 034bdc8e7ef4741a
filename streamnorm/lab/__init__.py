"""The lab: runs, studies, learning from files, benchmarks and the command line. The library does not import it."""
