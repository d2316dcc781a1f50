# The loss of OpenAI's gpt2-medium (354M parameters) on the validation split of OpenWebText.
#
#     python train.py config/eval_gpt2_medium.py
init_from = 'gpt2-medium'
eval_only = True
eval_iters = 500
batch_size = 8
