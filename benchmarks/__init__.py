"""What saving, loading and finding cost, side by side with the limits and with other libraries.

`python -m benchmarks` measures and writes `RESULTS.md`; `python -m benchmarks.compare REV1 REV2`
measures two commits against each other. See `README.md` beside this file.
"""
