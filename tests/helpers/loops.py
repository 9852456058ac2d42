"""The formulas as plain loops, one number at a time, to compare the code with.

Losses and weights are computed in `decimal`, in which no scale overflows.
"""

import decimal
import math
import statistics
from decimal import Decimal

import numpy as np

decimal.getcontext().prec = 40

decimal.getcontext().Emax = decimal.MAX_EMAX

decimal.getcontext().Emin = decimal.MIN_EMIN


def similarity(image, caption, measure="cosine"):
    """The similarity of one image embedding and one caption embedding."""
    if measure == "cosine":
        return sum(
            (Decimal(float(a)) * Decimal(float(b)) for a, b in zip(image, caption)), Decimal(0)
        )
    violations = (
        max(Decimal(0), Decimal(float(b)) - Decimal(float(a))) for a, b in zip(image, caption)
    )
    return -sum((violation * violation for violation in violations), Decimal(0)).sqrt()


def similarities(images, captions, measure="cosine"):
    """The similarities as rows: S[i][j] belongs to image i and caption j."""
    return [[similarity(image, caption, measure) for caption in captions] for image in images]


def sum_margin(S, margin):
    """The hinge costs of all wrong pairs, both ways."""
    total, margin, n = Decimal(0), Decimal(margin), len(S)
    for i in range(n):
        for j in range(n):
            if i != j:
                total += max(Decimal(0), margin + S[i][j] - S[i][i]) + max(
                    Decimal(0), margin + S[i][j] - S[j][j]
                )
    return float(total)


def max_margin(S, margin):
    """Each image's and each caption's worst wrong pair."""
    total, margin, n = Decimal(0), Decimal(margin), len(S)
    for i in range(n):
        total += max([Decimal(0)] + [margin + S[i][j] - S[i][i] for j in range(n) if j != i])
        total += max([Decimal(0)] + [margin + S[j][i] - S[i][i] for j in range(n) if j != i])
    return float(total)


def hal(S, alpha, epsilon, pair_weights=None, positive_weights=None, image_of=None):
    """HAL's loss, local without weights.

    image_of: pairs with equal numbers are not each other's negatives.
    """
    n, alpha, epsilon, total = len(S), Decimal(alpha), Decimal(epsilon), Decimal(0)
    W = pair_weights or [[Decimal(1)] * n] * n
    w = positive_weights or [Decimal(1)] * n
    zeroed = [[Decimal(0) if i == j else S[i][j] for j in range(n)] for i in range(n)]
    E = [[(alpha * W[i][j] * (zeroed[i][j] - epsilon)).exp() for j in range(n)] for i in range(n)]
    for i in range(n):
        for j in range(n):
            if image_of is not None and i != j and image_of[i] == image_of[j]:
                E[i][j] = Decimal(0)
    for i in range(n):
        column, row = sum(E[j][i] for j in range(n)), sum(E[i][j] for j in range(n))
        total += (
            (1 + column).ln() / alpha
            + (1 + row).ln() / alpha
            - (1 + max(Decimal(0), w[i] * S[i][i])).ln()
        )
    return float(total / n)


def hal_gradient(S, alpha, epsilon, pair_weights=None, positive_weights=None, image_of=None):
    """The gradient of `hal` in each similarity, as rows of floats."""
    n, alpha, epsilon = len(S), Decimal(alpha), Decimal(epsilon)
    W = pair_weights or [[Decimal(1)] * n] * n
    w = positive_weights or [Decimal(1)] * n
    image_of = image_of or range(n)
    E = [[Decimal(0)] * n for _ in range(n)]
    for i in range(n):
        for j in range(n):
            if i == j or image_of[i] != image_of[j]:
                score = Decimal(0) if i == j else S[i][j]
                E[i][j] = (alpha * W[i][j] * (score - epsilon)).exp()
    gradient = [[0.0] * n for _ in range(n)]
    for i in range(n):
        for j in range(n):
            row, column = 1 + sum(E[i]), 1 + sum(E[k][j] for k in range(n))
            slope = W[i][j] * (E[i][j] / row + E[i][j] / column)
            if i == j:
                slope = -w[i] / (1 + w[i] * S[i][i]) if w[i] * S[i][i] > 0 else Decimal(0)
            gradient[i][j] = float(slope / n)
    return gradient


def global_weights(
    images, captions, indices, bank, k, alpha, beta, epsilon, positive_epsilon=0.2, measure="cosine"
):
    """(W, w) as lists, or (None, None) if no bank entry is left.

    bank: (images, captions, indices).
    """
    n, alpha, beta, epsilon = len(images), Decimal(alpha), Decimal(beta), Decimal(epsilon)
    positive_epsilon = Decimal(positive_epsilon)
    left = [row for row, index in enumerate(bank[2]) if int(index) not in {int(i) for i in indices}]
    if not left:
        return None, None
    k = min(k if n >= k else n, len(left))
    # The order similarity is called with the caption in the first place here, as in the released
    # code.
    P = [
        sorted((similarity(images[i], bank[1][row], measure) for row in left), reverse=True)[:k]
        for i in range(n)
    ]
    Q = [
        sorted((similarity(captions[j], bank[0][row], measure) for row in left), reverse=True)[:k]
        for j in range(n)
    ]
    own = [similarity(images[i], captions[i], measure) for i in range(n)]
    n_i = [sum((beta * p - epsilon).exp() for p in P[i]) for i in range(n)]
    m_j = [sum((beta * q - epsilon).exp() for q in Q[j]) for j in range(n)]
    W = [
        [
            Decimal(0)
            if i == j
            else (n_i[i] + m_j[j])
            / (n_i[i] + m_j[j] + (beta * own[i]).exp() + (beta * own[j]).exp())
            for j in range(n)
        ]
        for i in range(n)
    ]
    w = []
    for i in range(n):
        pair = (alpha * (own[i] - positive_epsilon)).exp()
        others = sum((alpha * (x - positive_epsilon)).exp() for x in (*P[i], *Q[i]))
        w.append(1 - pair / (pair + others))
    return W, w


def tied_or_better(score, own):
    """Whether another item ranks before the own one.

    Its score is at most two units in the last place lower.
    """
    bar = np.nextafter(np.nextafter(own, own.dtype.type(-np.inf)), own.dtype.type(-np.inf))
    return not score < bar


def ranks(scores):
    """(N, 5N) scores -> (image ranks, caption ranks), 0-based lists."""
    n = len(scores)
    image_ranks, caption_ranks = [], []
    for i in range(n):
        best = scores[i, 5 * i : 5 * i + 5].max()  # NaN where one is
        image_ranks.append(
            sum(tied_or_better(scores[i, c], best) for c in range(5 * n) if c // 5 != i)
        )
    for c in range(5 * n):
        caption_ranks.append(
            sum(tied_or_better(scores[i, c], scores[c // 5, c]) for i in range(n) if i != c // 5)
        )
    return image_ranks, caption_ranks


def recall(ranks):
    """[r1, r5, r10, medr, meanr] of 0-based ranks."""
    ranks = [int(rank) for rank in ranks]
    shares = [100 * sum(rank < k for rank in ranks) / len(ranks) for k in (1, 5, 10)]
    return [*shares, math.floor(statistics.median(ranks)) + 1, statistics.fmean(ranks) + 1]


def info_nce(S, temperature):
    """The mean over both directions of the cross entropy of similarities / temperature."""
    total, n = 0.0, len(S)
    for i in range(n):
        for line in ([S[i][j] for j in range(n)], [S[j][i] for j in range(n)]):
            scores = [math.exp(float(score) / temperature) for score in line]
            total -= math.log(scores[i] / sum(scores))
    return total / (2 * n)


def whole_numbers(n, width, seed, dtype=np.float64):
    """Embeddings whose similarities are exact, and full of ties."""
    rng = np.random.default_rng(seed)
    return (
        rng.integers(-1, 2, (n, width)).astype(dtype),
        rng.integers(-1, 2, (5 * n, width)).astype(dtype),
    )


def ranks_of_groups(scores, image_of, ties_win=False):
    """(N, C) scores -> (image ranks, caption ranks), 0-based lists; image_of: each caption's image.

    ties_win: equal scores rank after the own one.
    """
    n_images, n_captions = len(scores), len(scores[0])
    own = [[c for c in range(n_captions) if image_of[c] == i] for i in range(n_images)]

    def before(score, best):
        if ties_win:
            return score > best and not tied_or_better(best, score)
        return tied_or_better(score, best)

    image_ranks = []
    for i in range(n_images):
        best = max(scores[i][c] for c in own[i])
        others = [c for c in range(n_captions) if c not in own[i]]
        image_ranks.append(sum(before(scores[i][c], best) for c in others))
    caption_ranks = []
    for c in range(n_captions):
        best = scores[image_of[c]][c]
        others = [i for i in range(n_images) if i != image_of[c]]
        caption_ranks.append(sum(before(scores[i][c], best) for i in others))
    return image_ranks, caption_ranks
