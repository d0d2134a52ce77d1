# SFT of SmolLM2-135M-Instruct, Apache 2.0, on conversations: a start for a model and data of your own on one consumer GPU of 8 to
# 24 GB, or a patient CPU (with --dtype=float32 --max_tokens=1024). Not a paper's experiment; no result is claimed.
#     python sft.py config/sft_smollm2.py
model = 'HuggingFaceTB/SmolLM2-135M-Instruct'  # or the folder that make real leaves: out/real/SmolLM2-135M-Instruct
data = 'ultrachat'
chat = True
dtype = 'bfloat16'
# a step of 32 conversations of at most 1,024 tokens, in microbatches that leave room on 8 GB
batch_size = 32
max_length = 1024
max_prompt_length = 512
max_tokens = 2048
# all 135 million weights train; a small model needs a larger learning rate than one of billions
lr = 2e-5
lr_schedule = 'cosine'
warmup_steps = 50
out_dir = 'out/sft_smollm2'
