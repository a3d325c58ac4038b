"""What a preference model must beat: the longer answer wins, and a logistic regression on words."""

from __future__ import annotations

from collections.abc import Sequence


def answers(pairs: Sequence[dict]) -> tuple[list[str], list[str]]:
    """(chosen texts, rejected texts)."""
    return [pair["chosen"][-1]["content"] for pair in pairs], [pair["rejected"][-1]["content"] for pair in pairs]


def length_baseline(pairs: Sequence[dict]) -> float:
    """Pairwise accuracy of 'the longer answer is preferred'; length in characters, ties count one half."""
    points = [
        1.0 if len(chosen) > len(rejected) else 0.5 if len(chosen) == len(rejected) else 0.0
        for chosen, rejected in zip(*answers(pairs), strict=True)
    ]
    return sum(points) / len(points)


def bag_of_words_baseline(train: Sequence[dict], test: Sequence[dict], seed: int = 0) -> float:
    """Pairwise accuracy on `test` of a logistic regression on the difference of log(1 + count) of words; ties count one
    half.

    No intercept, so that swapping the answers of a pair turns the sign. One fixed, strong penalty (C = 0.01: words are
    many, pairs few) and no search. Words in fewer than 3 answers are left out.
    """
    import numpy as np
    from scipy import sparse
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    vectorizer = CountVectorizer(
        min_df=min(3, 2 * len(train)), max_features=20_000, token_pattern=r"(?u)\b\w+\b|[^\w\s]"
    )
    chosen, rejected = answers(train)
    vectorizer.fit(chosen + rejected)

    def features(first: list[str], second: list[str]) -> sparse.csr_matrix:
        return (vectorizer.transform(first).log1p() - vectorizer.transform(second).log1p()).tocsr()

    # A classifier needs both labels: a seeded half of the pairs is turned round.
    signs = np.where(np.random.default_rng(seed).random(len(train)) < 0.5, 1.0, -1.0)
    if len(train) > 1 and abs(signs.sum()) == len(train):
        signs[0] = -signs[0]
    model = LogisticRegression(C=0.01, fit_intercept=False, solver="liblinear", random_state=seed, max_iter=200)
    model.fit(sparse.diags(signs) @ features(chosen, rejected), signs)
    scores = model.decision_function(features(*answers(test)))
    return float(np.mean(np.where(scores > 0, 1.0, np.where(scores == 0, 0.5, 0.0))))
