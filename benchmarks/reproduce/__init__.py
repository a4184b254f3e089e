"""The paper's tables, and the decoy benchmark, run through `tune/` and written up: `make reproduce`.

stages.py    what is run: spaces of trials, each a sweep that is resumed where it stopped
weights.py   which λ an objective gets
decoys.py    what is measured of a model that was trained on decoys
collect.py   finished runs as docs/results/*.json
page.py      docs/results.md, from those files alone
figures.py   its pictures
sketches.py  ten drawings for each data set, in place of prototypes
"""
