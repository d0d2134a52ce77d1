# KTO, arXiv:2402.01306, of SmolLM2-135M-Instruct on single answers, made of UltraFeedback's pairs, on one consumer GPU of 8 to 24 GB,
# or a patient CPU (with --dtype=float32 --max_tokens=1024). Not the paper's experiment; no result is claimed.
#     python dpo.py config/kto_smollm2.py
model = 'HuggingFaceTB/SmolLM2-135M-Instruct'  # or the folder that make real leaves: out/real/SmolLM2-135M-Instruct
data = 'ultrafeedback'
chat = True
dtype = 'bfloat16'
loss = 'kto'
beta = 0.1
batch_size = 64  # answers, not pairs: z is estimated over those of a step
max_length = 1024
max_prompt_length = 512
max_tokens = 2048  # leaves room on 8 GB
lr = 1e-5  # its first gradient is a quarter of DPO's
lr_schedule = 'linear'
warmup_steps = 50
eval_every = 19968
out_dir = 'out/kto_smollm2'
