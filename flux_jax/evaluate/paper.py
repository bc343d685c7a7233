"""The tables of the paper, to print beside (1.58-bit FLUX, arXiv 2412.18653: T2I-CompBench, then GenEval).

Scores are shares of 1; the first column is the mean of the others. T2I-CompBench's last two columns are judged by
ShareGPT4V with a chain of thought, as in T2I-CompBench++; its CLIP and 3-in-1 scores are other quantities.
"""

GENEVAL_TITLE, GENEVAL_COLUMNS = (
    "GenEval",
    {
        "overall": "Overall",
        "single_object": "Single",
        "two_object": "Two",
        "counting": "Counting",
        "colors": "Colors",
        "position": "Position",
        "color_attr": "Color attr.",
    },
)
GENEVAL = {
    "SDXL": (0.55, 0.98, 0.74, 0.39, 0.85, 0.15, 0.23),
    "FLUX.1-dev": (0.66, 0.98, 0.81, 0.74, 0.79, 0.22, 0.45),
    "1.58-bit FLUX, no kernel": (0.64, 0.98, 0.79, 0.69, 0.77, 0.20, 0.43),
    "1.58-bit FLUX": (0.64, 0.98, 0.77, 0.68, 0.79, 0.21, 0.44),
}

T2I_TITLE, T2I_COLUMNS = (
    "T2I-CompBench",
    {
        "overall": "Avg.",
        "color": "Color",
        "shape": "Shape",
        "texture": "Texture",
        "spatial": "2D",
        "3d_spatial": "3D",
        "numeracy": "Numeracy",
        "non_spatial": "Non-spatial",
        "complex": "Complex",
    },
)
T2I = {
    "SDXL": (0.5255, 0.5879, 0.4687, 0.5299, 0.2133, 0.3566, 0.4988, 0.7673, 0.7817),
    "PixArt-α-ft": (0.5586, 0.6690, 0.4927, 0.6477, 0.2064, 0.3901, 0.5058, 0.7747, 0.7823),
    "FLUX.1-dev": (0.5876, 0.7529, 0.5056, 0.6299, 0.2791, 0.4014, 0.6131, 0.7807, 0.7380),
    "1.58-bit FLUX, no kernel": (0.5806, 0.7358, 0.4900, 0.6151, 0.2781, 0.4037, 0.6089, 0.7807, 0.7327),
    "1.58-bit FLUX": (0.5812, 0.7390, 0.4910, 0.6162, 0.2757, 0.4049, 0.6137, 0.7793, 0.7300),
}
