"""The run as one self-contained page, and its model card.

- ``record``: a run folder read into one object; parts that a run does not have are empty, never an error.
- ``facts``: what both the page and the card say: the method with its formula, the data, what to do next.
- ``measures``: the measured numbers with their intervals, in words.
- ``drawing``: curves, histograms and estimates as inline SVG, the same bytes for the same numbers, and as images.
- ``figures``: which of them a run's report has.
- ``report``: ``report.html``: one file, no network, readable on a phone and in the dark.
- ``methods``: the page of losses, ``align recipes methods``.
- ``filtered``: the page of a filter: scores with the cut, both ends side by side, before and after.
- ``card``: ``README.md``: the model card, with nothing in it that was not measured.
"""
