# Kappa-IP's detector with the average that pytorch-cpr's single-tensor path has: it starts at zero and is not corrected
# for that. Everything else stays. To be put behind a config of AdamCPR, with --impl=torch where there is a GPU:
#
#     python train.py config/train_scarce_cpr.py results/detector/zero_started.py
from kernels import plain


def _slows_down(R, step, proceed, state, every, ema_decay):
    import torch  # what a config file imports is not seen from inside its functions

    ema, last, growth = (state[k] for k in ('ema', 'ema_last', 'ema_growth'))
    ema.copy_(torch.where(proceed, ema_decay * ema.nan_to_num(0.0) + (1 - ema_decay) * R, ema))
    look = (step % every == 0) & proceed
    grown = ema - last
    found = look & (step >= 4 * every) & (grown < growth)
    growth.copy_(torch.where(look, grown, growth))
    last.copy_(torch.where(look, ema, last))
    return found


plain._slows_down = _slows_down
