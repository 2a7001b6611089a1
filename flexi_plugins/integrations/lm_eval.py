"""Pruned folders, uniform or not, as lm-eval's model ``flexi``.

    python -m flexi_plugins.integrations.lm_eval run --model flexi --model_args pretrained=pruned --tasks piqa

lm-eval's table of models is fixed. This adds one to it and hands over to lm-eval's own command line, so that every
option of it works; in Python, ``register()`` comes before ``lm_eval.simple_evaluate(model="flexi", ...)``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import model_registry
from lm_eval.models.huggingface import HFLM

from flexi_plugins.data import PruningPlan
from flexi_plugins.errors import FlexiError
from flexi_plugins.models import locate
from flexi_plugins.rewrite import PLAN_FILE

NAME = "flexi"
TARGET = "flexi_plugins.integrations.lm_eval:FlexiLM"  # by name, since run with -m this module is __main__ as well


class FlexiLM(HFLM):
    """lm-eval's own HFLM, with all its arguments, on what ``--model`` of ``flexi`` takes: folders first of all.

    Its results say which plan the folder was made by.
    """

    def __init__(self, pretrained: str, backend: str = "causal", **arguments: Any) -> None:
        if arguments.get("trust_remote_code"):
            raise FlexiError("model flexi: code that comes with a model is never run; drop trust_remote_code")
        super().__init__(pretrained=str(locate(pretrained)), backend=backend, **arguments)

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval's results say of the model, with hash, ratio and origin of its plan where there is one."""
        found = super().get_model_info()
        file = Path(self.pretrained) / PLAN_FILE
        if file.is_file():
            plan = PruningPlan.from_json(json.loads(file.read_text(encoding="utf-8")))
            found |= {"flexi_plan": plan.hash, "flexi_ratio": plan.ratio, "flexi_origin": dict(plan.origin)}
        return found


def register() -> None:
    """Make lm-eval know the model ``flexi``."""
    if NAME not in model_registry:
        model_registry.register(NAME, target=TARGET)


def main() -> None:
    """Run lm-eval's command line; an error of ours is one message and exit status 2."""
    register()
    try:
        cli_evaluate()
    except FlexiError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
