"""Where `fly-build` starts."""

from fly_trt.cli.start import start


def main() -> None:
    start("fly-build", "fly_build.cli")
