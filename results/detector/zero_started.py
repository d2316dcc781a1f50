# Kappa-IP's detector with the moving average of pytorch-cpr's single-tensor path: it starts at zero
# and is not corrected for that. Everything else stays. Put it behind a config of AdamCPR:
#
#     python train.py config/train_scarce_cpr.py results/detector/zero_started.py
import torch

from cpr import AdamCPR


def _slows_down(self, b, where=torch.where):  # a config's functions do not see its imports
    step, every, beta = b.state['step'], b.group['reg_step_size'], b.group['reg_ema_decay']
    ema, last, growth = (b.state[key] for key in ('ema', 'ema_last', 'ema_growth'))
    correction = 1 - beta ** step.to(b.R)
    ema.lerp_(b.R, where(b.active, (1 - beta) / correction, 0.0))
    average = correction * ema  # the average that started at zero
    look = b.active & (step % every == 0)
    grown = average - last
    slower = look & (step >= 4 * every) & (grown < growth)
    growth.copy_(where(look, grown, growth))
    last.copy_(where(look, average, last))
    return slower


AdamCPR.slows_down = _slows_down
