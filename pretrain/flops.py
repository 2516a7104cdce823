"""What a patch costs: the floating-point operations that training on it needs, whatever the trainer spends.

F = 3 * student forward + teacher forward (2 a multiply-add, matrix products and convolutions only; backward is twice forward).
Rows that stochastic depth leaves out are not counted, nor are recomputation and a Gram teacher: wasting work does not raise F.
"""

import torch
from torch.utils.flop_counter import FlopCounterMode

from histoscale.data import keys as draw
from histoscale.data.views import ViewsConfig
from histoscale.pretrain.backbone import ModelConfig
from histoscale.pretrain.methods import MethodConfig, build, masks_at


def flops_a_patch(model: ModelConfig, method: MethodConfig, views: ViewsConfig) -> float:
    """FLOPs of one patch in one step, counted on a forward of `method.group` patches without memory (torch's meta device)."""
    patches = method.group
    with torch.device("meta"):
        student, teacher = build(model, method, 0)
        global_views = torch.empty(views.global_count * patches, 3, views.global_px, views.global_px)
        local_views = torch.empty(views.local_count * patches, 3, views.local_px, views.local_px)
    slots = torch.arange(patches)
    masks = masks_at(model, method, 0, 0, slots, views.global_px, views.global_count)
    crops, indices = (None, None) if masks is None else (masks.crops.to("meta"), masks.indices.to("meta"))
    keys = draw.keys(0, "stochastic depth", 0, slots).to("meta")
    with FlopCounterMode(display=False) as learned:
        student(global_views, local_views, crops, indices, keys)
    with FlopCounterMode(display=False) as taught, torch.no_grad():
        teacher(global_views, None, None, indices)
    return (3 * learned.get_total_flops() + taught.get_total_flops()) / patches
