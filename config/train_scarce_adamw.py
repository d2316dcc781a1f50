# A very small GPT with AdamW on so little text that it overfits: 33 epochs in 15 seconds.
# The studies in results/ use it. config/train_scarce_cpr.py and config/train_scarce_wn.py differ
# from it only in the optimizer.
#
#     python data/shakespeare_scarce/prepare.py
#     python train.py config/train_scarce_adamw.py
out_dir = 'out-scarce-adamw'
wandb_project = 'scarce'
wandb_run_name = 'scarce-adamw'
optimizer = 'adamw'
weight_decay = 0.1

dataset = 'shakespeare_scarce'
batch_size = 16
block_size = 64
gradient_accumulation_steps = 1

n_layer = 2
n_head = 4
n_embd = 64

learning_rate = 1e-2  # a small model can take a high one
min_lr = 1e-4
warmup_iters = 40
max_iters = 800
lr_decay_iters = max_iters
beta2 = 0.99  # few tokens an iteration: average the squares over more of them

eval_interval = 100
eval_iters = 0
log_interval = 100
norm_log_interval = 200
compile = False  # takes longer than it saves here
