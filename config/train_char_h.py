# A small GPT on the characters of Python's standard library, with AdamH.
# It holds the norm of each weight matrix. At the peak of the schedule a step's length is
# adamh_step_scale * learning_rate = 2 % of that norm. It ended at a validation loss of 1.51, and
# config/train_char_adamw.py, whose norms grow to 3 times the start, at 1.33 (one seed).
#
#     python data/pystdlib_char/prepare.py
#     python train.py config/train_char_h.py
out_dir = 'out-char-h'
wandb_project = 'char'
wandb_run_name = 'char-h'
optimizer = 'adamh'
adamh_step_scale = 5.0

dataset = 'pystdlib_char'
batch_size = 32
block_size = 128
gradient_accumulation_steps = 1

n_layer = 4
n_head = 4
n_embd = 128
init_std = 0.06  # GPT-2's 0.02 suits a width of 768; a narrow model needs more

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
