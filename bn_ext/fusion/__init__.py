"""Batch norm, an addition and an activation in one pass, wherever a model shows them to be the same as one by one.

A batch norm stays a batch norm. What fuses is whoever calls it and what follows it, decided anew at every call:

    pairing.py   at a call: may these be computed in one pass here and now? If not, they are called one by one.
    container.py BatchNormAct1d, for users who write the pair themselves
    source.py    a method's syntax tree, proven to be what runs, and a function compiled from a changed one
    resolve.py   which modules an expression of a method can be
    chains.py    what follows a batch norm's call in the source, and what the source becomes
    parents.py   classes with such a forward in place of the model's own
    report.py    every batch norm of a model: where it is called, what is computed there, why not more
"""
