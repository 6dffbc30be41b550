"""One module a library: each trains the same rows from the same adapter in a process of its own.

``python -m benchmarks.arms.<library> '<job as JSON>'`` writes its figures to the file that the job names. What all
share is in ``common.py``; nothing here is imported by ``benchmarks.train``, whose own process has to stay small.
"""
