"""Confidence intervals."""
import math

Z = 1.959963984540054      # 95 % of a normal distribution lie within so many standard deviations


def wilson(p: float, count: int) -> tuple[float, float]:
    """The 95 % interval (Wilson's) of a share p of `count` independent observations."""
    center = p + Z * Z / (2 * count)
    half = Z * math.sqrt(p * (1 - p) / count + Z * Z / (4 * count * count))
    scale = 1 + Z * Z / count
    return max(0.0, min((center - half) / scale, p)), min(1.0, max((center + half) / scale, p))
