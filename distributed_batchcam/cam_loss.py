"""What every loss on explanations has in common: how the trainer calls it, and what it asks for."""

from torch import Tensor, nn


class CAMLoss(nn.Module):
    """A loss on explanations, for one rank's share of a batch.

    The trainer calls `loss(logits (N, C), features (N, K, H, W), targets (N,), images (N, ch, h, w) in [0, 1], alpha=…,
    batch_size=…)`, where `alpha` is what `cam.channel_weights` takes and `batch_size` that of the global batch; it
    returns an unweighted scalar, scaled such that DDP's average over ranks is that of one process on all of the batch.
    """

    needs_masks = False
    """Whether it is called with `masks=` (N, h, w) too, true where evidence must not come from."""

    differentiates_images = False
    """Whether images must require a gradient, and the network be one that can be differentiated twice."""

    @property
    def note(self) -> str:
        """What the user should know of it before training begins; a line, or nothing."""
        return ""

    @property
    def pictures(self) -> dict[str, Tensor]:
        """Pictures (h, w) in [0, 1] that go with the note, by name; a run directory holds them as NAME.png."""
        return {}

    def compile_maps(self) -> None:
        """Compile what is differentiated once only; a loss that says nothing else has nothing worth compiling."""
