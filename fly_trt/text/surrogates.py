"""What Python calls a text and no tokenizer or client can take."""

from fly_trt.errors import RequestError


def check_text(name: str, text: str) -> None:
    """Raises RequestError for a lone surrogate: Python makes one of a byte that is no UTF-8, and of JSON's escapes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{name}: {text[error.start]!a} at character {error.start} is half of a surrogate pair and no text: "
            "decode its source as UTF-8, or leave it out"
        ) from None
