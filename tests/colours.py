"""The colours of a style sheet, and whether they can be told from one another."""

import re


def variables(css: str) -> tuple[dict[str, str], dict[str, str]]:
    """The colours of a style sheet, light and dark."""
    light, dark = css.split("@media (prefers-color-scheme: dark)")
    found = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", part)) for part in (light, dark)]
    return found[0], found[1]


def contrast(one: str, other: str) -> float:
    """WCAG 2.2's contrast ratio of two colours as #rrggbb."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)
