# Finetune GPT-2 on Shakespeare, as nanoGPT's example does.
# A few minutes on one GPU of 24 GB, or of 80 GB for gpt2-xl.
#
#     python data/shakespeare/prepare.py
#     python train.py config/finetune_shakespeare.py
out_dir = 'out-shakespeare'
wandb_project = 'shakespeare'
dataset = 'shakespeare'
init_from = 'gpt2-xl'
always_save_checkpoint = False  # keep the best checkpoint: the model overfits soon

# 1 sequence x 32 micro-steps x 1024 tokens = 32,768 tokens an iteration
# the text has 301,966 tokens: 20 iterations are two epochs
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

eval_interval = 5
eval_iters = 40
learning_rate = 3e-5
decay_lr = False
