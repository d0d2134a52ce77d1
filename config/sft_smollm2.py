# SFT of SmolLM2-135M-Instruct, Apache 2.0, on conversations: a start for a model and data of your own on one consumer GPU of 8 to
# 24 GB, or a patient CPU (with --dtype=float32 --max_tokens=1024). Not a paper's experiment; no result is claimed.
#     python sft.py config/sft_smollm2.py
model = 'HuggingFaceTB/SmolLM2-135M-Instruct'  # or the folder that make real leaves: out/real/SmolLM2-135M-Instruct
data = 'ultrachat'
chat = True
dtype = 'bfloat16'
batch_size = 32
max_length = 1024
max_prompt_length = 512
max_tokens = 2048  # leaves room on 8 GB
lr = 2e-5  # a small model needs a larger one than a model of billions
lr_schedule = 'cosine'
warmup_steps = 50
out_dir = 'out/sft_smollm2'
