"""Published results on the logs of the experiments.

Every model ranks the whole catalog for the last item of each user. Recall is the hit rate.
"""

from __future__ import annotations

_AT_10 = ("recall@10", "ndcg@10")
_AT_5_10 = ("recall@5", "ndcg@5", *_AT_10)
_AT_5_10_20 = (*_AT_5_10, "recall@20", "ndcg@20")

# Log -> [(model, history, source, {metric: value})].
PUBLISHED: dict[str, list[tuple[str, str, str, dict[str, float]]]] = {
    "Instruments.inter.json": [
        ("LARES", "not masked", "paper", dict(zip(_AT_5_10, (0.0411, 0.0263, 0.0636, 0.0336), strict=True))),
        ("LARES", "not masked", "RecBole3.0", dict(zip(_AT_5_10, (0.0388, 0.0246, 0.0610, 0.0318), strict=True))),
        ("SASRec", "not masked", "ETEGRec paper, L 50", dict(zip(_AT_5_10, (0.0341, 0.0217, 0.0530, 0.0277), strict=True))),
    ],
    "Beauty.txt": [
        (
            "BSARec",
            "masked",
            "authors' log, L 50",
            dict(zip(_AT_5_10_20, (0.0736, 0.0523, 0.1008, 0.0611, 0.1373, 0.0703), strict=True)),
        ),
        (
            "WEARec",
            "masked",
            "authors' log, L 50",
            dict(zip(_AT_5_10_20, (0.0738, 0.0516, 0.1041, 0.0614, 0.1391, 0.0703), strict=True)),
        ),
        (
            "SASRec, 256 sampled negatives",
            "masked",
            "eSASRec benchmark",
            dict(zip(_AT_10, (0.0921, 0.0531), strict=True)),
        ),
        (
            "SASRec, binary cross entropy",
            "masked",
            "S3-Rec repository",
            dict(zip(_AT_5_10_20, (0.0387, 0.0249, 0.0605, 0.0318, 0.0902, 0.0394), strict=True)),
        ),
    ],
}
