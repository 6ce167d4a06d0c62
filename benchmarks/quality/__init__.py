"""At equal budget, is compressed causal attention as good as full attention? ``python -m benchmarks.quality --help``.

``prepare``  text files to token ids, the validation documents in two halves, packed to travel
``unpack``   the packed files back to a folder of data
``run``      the runs of a theme (a JSON file of this folder), on every GPU, finished ones skipped
``report``   tables and pictures of what is finished

The protocol is in docs/quality.md.
"""
