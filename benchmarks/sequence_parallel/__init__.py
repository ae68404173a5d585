"""What splitting the sequence over ranks costs and gives: ``python -m benchmarks.sequence_parallel``.

plan         sizes of a run
ranks        processes on this machine
subject      a model on a mesh inside its engine
traffic      bytes sent, counted, against the formulas
stages       how long each stage of a layer takes
pacing       a layer's stages on the clock, measured or padded
wavefront    whole steps with padded stages, traced
simulate     a discrete-event model of the same steps
extrapolate  what the model says of other meshes and lengths
throughput   two ranks against two processes alone
memory       peak memory of a rank, and the longest rows that fit
sections     the cases of a run
targets      the project's targets against a record
tables       a record as markdown
picture      a record as docs/wavefront.png
"""
