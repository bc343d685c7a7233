"""How far two pictures, and the two paths to them, lie apart.

In: pictures uint8 [h, w, 3], latents float32 [steps, i, c]. Out: PSNR in decibels, SSIM, shares of pixel values, the
latents' relative error behind each step. PSNR and SSIM are scikit-image's; SSIM with the Gaussian window of Wang et al.
(2004), the mean over the three channels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from flux_jax.evaluate.statistics import margin

ROUNDING = 1e-3  # of a picture's values may lie more than 1 (of 255) apart where only rounding differs
WINDOW = 11  # pixels: the least edge of a picture that SSIM is defined for


def picture_metrics(a: UInt8[np.ndarray, "h w 3"], b: UInt8[np.ndarray, "h w 3"]) -> dict[str, Any]:
    """psnr (None where the pictures are identical), ssim (None below 11 pixels), `largest` difference of two values,
    the share `apart` by more than 1, and whether they are the `same` up to rounding."""
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    largest = int(np.abs(a.astype(np.int16) - b).max())
    apart = float((np.abs(a.astype(np.int16) - b) > 1).mean())
    ssim = None
    if min(a.shape[:2]) >= WINDOW:
        gaussian = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        ssim = float(structural_similarity(a, b, channel_axis=2, data_range=255, **gaussian))
    psnr = float(peak_signal_noise_ratio(a, b, data_range=255)) if largest else None
    return {"psnr": psnr, "ssim": ssim, "largest": largest, "apart": apart, "same": apart <= ROUNDING}


def latent_errors(a: Float[np.ndarray, "steps i c"], b: Float[np.ndarray, "steps i c"]) -> list[float]:
    """|b - a| / |a| behind each step, in the Euclidean norm; both started from the same noise."""
    difference, size = (np.linalg.norm(x.reshape(len(x), -1).astype(np.float64), axis=1) for x in (b - a, a))
    return (difference / np.maximum(size, 1e-30)).tolist()


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Over all pictures: how many are identical and the same up to rounding; PSNR of the mean squared error, median and
    least PSNR; mean and least SSIM; median and largest latent error behind each step; where networks judged, `lpips`,
    `clip_a`, `clip_b` and, picture by picture, `clip_b_minus_a`, each a mean with its interval."""
    found = [row["psnr"] for row in rows if row["psnr"] is not None]
    squared = [10 ** (-psnr / 10) for psnr in found] + [0.0] * (len(rows) - len(found))
    similar = [row["ssim"] for row in rows if row["ssim"] is not None]
    errors = np.array([row["latent_errors"] for row in rows])
    return {
        "pictures": len(rows),
        "identical": len(rows) - len(found),
        "same": sum(row["same"] for row in rows),
        "largest": max(row["largest"] for row in rows),
        "psnr": None if not found else float(-10 * np.log10(np.mean(squared))),
        "psnr_median": None if not found else _median([np.inf if row["psnr"] is None else row["psnr"] for row in rows]),
        "psnr_least": min(found, default=None),
        "ssim": float(np.mean(similar)) if similar else None,
        "ssim_least": min(similar, default=None),
        "latent_errors_median": np.median(errors, axis=0).tolist(),
        "latent_errors_largest": errors.max(axis=0).tolist(),
        **network_means(rows),
    }


def network_means(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of what networks say, the mean and its 95 % interval over prompts (None for a single picture)."""
    columns = {key: [row[key] for row in rows] for key in ("lpips", "clip_a", "clip_b") if key in rows[0]}
    if "clip_a" in columns:
        columns["clip_b_minus_a"] = [row["clip_b"] - row["clip_a"] for row in rows]
    found = {}
    for key, values in columns.items():
        middle = float(np.mean(values))
        half = margin(values) if len(values) > 1 else None
        found[key] = {"mean": middle, "interval": None if half is None else [middle - half, middle + half]}
    if "lpips" in columns:
        found["lpips"]["largest"] = max(columns["lpips"])
    return found


def _median(values: Sequence[float]) -> float | None:
    """None where it is infinite, which JSON cannot say."""
    middle = float(np.quantile(values, 0.5, method="lower"))
    return middle if np.isfinite(middle) else None


def verdict(result: dict[str, Any]) -> str:
    """The summary in a sentence, as the paper puts it for its kernel."""
    count, same, identical = result["pictures"], result["same"], result["identical"]
    if identical == count:
        return f"All {count} pictures are identical to the last bit."
    rule = f"at most {ROUNDING:.1%} of values more than 1 of 255 apart"
    if same == count:
        return f"All {count} pictures are the same up to rounding ({rule}; {identical} identical)."
    return f"{same} of {count} pictures are the same up to rounding ({rule}; {identical} identical)."


def sentences(result: dict[str, Any]) -> list[str]:
    """The summary for people: the verdict, then a line for each kind of measure that there is."""
    lines = [verdict(result)]
    if result["psnr"] is not None:
        similar = "" if result["ssim"] is None else f"; SSIM {result['ssim']:.4f}, worst {result['ssim_least']:.4f}"
        lines.append(f"PSNR {result['psnr']:.2f} dB, worst {result['psnr_least']:.2f} dB{similar}.")
    if "lpips" in result:
        lines.append(f"LPIPS {interval(result['lpips'], 4)}, worst {result['lpips']['largest']:.4f}.")
    if "clip_a" in result:
        a, b, change = (interval(result[key], 2) for key in ("clip_a", "clip_b", "clip_b_minus_a"))
        lines.append(f"CLIP score {a} of A, {b} of B; B minus A {change}.")
    return lines


def interval(found: dict[str, Any], digits: int) -> str:
    """`26.31 [25.90, 26.72]`, or the mean alone where there is no interval."""
    bounds = found["interval"] and ", ".join(f"{bound:.{digits}f}" for bound in found["interval"])
    return f"{found['mean']:.{digits}f}" + (f" [{bounds}]" if bounds else "")
