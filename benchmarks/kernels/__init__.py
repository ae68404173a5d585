"""Speed and memory of the compress operation, beside its rivals: ``python -m benchmarks.kernels``.

timing    clocks, one timed forward + backward, contenders in turns, median and spread
record    the JSON that grows case by case, so that a killed run resumes
sizes     shapes, random operands, floors in bytes and arithmetic
plain     the rival on a CPU: autograd through a plain loop over chunks
rivals    the rivals on a GPU, all optional
memory    bytes held for backward, and peak memory in a process of its own
cpu, gpu  the cases
device    the GPU as the cases see it
targets   the project's targets against a record
tables    a record as markdown
"""
