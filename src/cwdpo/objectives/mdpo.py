"""mDPO: DPO, a conditional pair that differs in the image only, and an anchor on the chosen response.

Source: Wang et al., "mDPO: Conditional Preference Optimization for Multimodal Large Language Models" (arXiv
2406.11839), eq. 3 to 5.
"""

from __future__ import annotations

from pydantic import Field

from cwdpo.objectives.base import (
    Objective,
    ObjectiveOutput,
    ScoredPairs,
    negative_log_sigmoid,
    rewards,
)


class Mdpo(Objective):
    """``L = L_text + image_weight L_image + anchor_weight L_anchor``, each a mean over prompts.

    ``L_text`` and ``L_image`` are ``-log sigmoid(beta (chosen_shift - rejected_shift))``, averaged over the prompt's
    text-side and image-side pairs; a prompt without pairs of a side adds 0 to it. ``L_anchor`` is
    ``-log sigmoid(beta chosen_shift - anchor)``: it keeps the reward of the chosen response above ``anchor``.

    Image-side pairs are in the data (``rejected_images``) or come from ``negatives.image_mix``; the paper's are
    ``{image_crop: 1.0}``, one for each prompt.

    Args:
        beta: inverse temperature, per nat.
        image_weight, anchor_weight: 1 in the paper.
        anchor: the reward (beta times nats) that the anchor asks for; 0 in the paper.
    """

    beta: float = Field(0.1, gt=0)
    image_weight: float = Field(1.0, ge=0)
    anchor_weight: float = Field(1.0, ge=0)
    anchor: float = 0.0

    def __call__(self, pairs: ScoredPairs) -> ObjectiveOutput:
        """Loss over P pairs of B prompts."""
        margin = self.beta * (pairs.chosen_shift - pairs.rejected.shift)
        per_pair = negative_log_sigmoid(margin)
        if pairs.image_side is None:
            text, image = pairs.mean_over_prompts(per_pair), per_pair.new_zeros(())
        else:
            text = pairs.mean_over_prompts(per_pair, ~pairs.image_side)
            image = pairs.mean_over_prompts(per_pair, pairs.image_side)
        anchor = pairs.mean_over_paired(negative_log_sigmoid(self.beta * pairs.chosen.shift - self.anchor))
        loss = text + self.image_weight * image + self.anchor_weight * anchor
        return ObjectiveOutput(
            loss,
            per_pair={"loss/pair": per_pair.detach(), **rewards(pairs, self.beta)},
            parts={
                "loss/text": text.detach(),
                "loss/image": image.detach(),
                "loss/anchor": anchor.detach(),
            },
        )
