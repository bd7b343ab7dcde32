"""Random SIGKILL of every process of a real stack, and what must be true afterwards (T-C1, T-C3).

__main__    `python -m benchmarks.chaos --uploads 60 --kills 8`: the last line is one JSON object
processes   starting, finding, killing and restarting processes
stack       the stack on PostgreSQL and Redis of its own, or embedded (SQLite, folder broker)
load        small scans with known masks, the model that finds them, clients that never give up
killer      whom to kill next, or to freeze while it holds a run
verdict     what is lost, doubled or stuck, by SQL and by the files
sabotage    the negative controls: fencing off, or nothing rung for again
"""
