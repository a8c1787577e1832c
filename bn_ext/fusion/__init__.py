"""Batch norm, an addition and an activation in one pass, wherever a model shows them to be the same as one by one.

A batch norm stays a batch norm. What fuses is whoever calls it and what follows it, decided anew at every call:

    pairing.py   at a call: may these be computed in one pass here and now? If not, they are called one by one.
    waiting.py   may a batch norm's call wait while other calls of the model run?
    container.py BatchNormAct1d, for users who write the pair themselves
    source.py    a method's syntax tree, proven to be what runs, and a function compiled from a changed one
    resolve.py   which objects an expression of a method can be
    chains.py    what follows a batch norm's call in the source
    between.py   what runs in between, and may
    syntax.py    questions that both ask of syntax trees
    rewrite.py   what the source becomes
    watch.py     classes whose code looks at classes, which have to keep theirs
    ghost.py     the loop of pytorch-tabnet over virtual batches in one call
    parents.py   subclasses with such methods in place of the model's own
    report.py    every batch norm of a model: where it is called, what is computed there, why not more
"""
