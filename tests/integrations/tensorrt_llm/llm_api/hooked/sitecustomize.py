"""Has this process start as where fly-trt is installed: runs the line that its wheel puts into site-packages."""

from pathlib import Path

PTH = "fly_trt/integrations/tensorrt_llm/fly_trt_tensorrt_llm.pth"
exec((Path(__file__).parents[5] / PTH).read_text(encoding="utf-8"))
