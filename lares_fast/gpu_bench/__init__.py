"""``lares-fast gpu-bench``: the speed of the ops, of training and of evaluation on a GPU, against the best rivals in PyTorch.

``rows.py`` lists the rows. ``candidates.py`` says how a row is checked and timed. ``bench.py`` runs rows in a process of their
own, ``results.py`` keeps what was measured, and ``table.py`` prints it.
"""
