# A small GPT on the Python standard library, character by character, with AdamWN: every weight matrix is steered to
# a multiple of the norm it starts with, over the first quarter of the run. 3 minutes on 2 CPU cores.
#
#     python data/pystdlib_char/prepare.py
#     python train.py config/train_char_wn.py
#
# To take each matrix to the ratio that it had at the end of an AdamW run, as the AdamWN paper does:
#
#     python train.py config/train_char_adamw.py
#     python train.py config/train_char_wn.py --wn_from=out-char-adamw
out_dir = 'out-char-wn'
wandb_project = 'char'
wandb_run_name = 'char-wn'
optimizer = 'adamwn'
wn_ratio = 2.0
wn_rate = 1e-2
wn_ramp_iters = 250

dataset = 'pystdlib_char'
batch_size = 32
block_size = 128
gradient_accumulation_steps = 1

n_layer = 4
n_head = 4
n_embd = 128

learning_rate = 4e-3  # a small model can take a high one
min_lr = 4e-4
warmup_iters = 100
max_iters = 1000
lr_decay_iters = max_iters
beta2 = 0.99  # few tokens an iteration: average the squares over more of them

eval_interval = 200
eval_iters = 40
log_interval = 25
norm_log_interval = 25
compile = False  # takes longer than it saves here
