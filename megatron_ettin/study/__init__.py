"""Study: siblings trained on the same rows, evaluated on the same tasks, shown on one page.

Folders and files of a study, below its `output`:

    runs/SIZE/ARM/seed_N/         run of the training: metrics.jsonl, ledger, checkpoints
    models/MODEL/                 its last checkpoint as a Hugging Face folder
    results/MODEL/TASK/seed_N.json    results of the evaluation (`evaluation.results`)
    series/MODEL.json             the checkpoints that were evaluated: step, tokens, name of the model
    series/MODEL-step_N/TASK/seed_N.json    results on these checkpoints
    proof.json                    proof that the arms saw the same rows (`study.proof`)
    stages/STAGE.json, STAGE.log  what a stage was, when it ran; what it printed
    page/                         the page

MODEL is SIZE-ARM-seed_N, or SIZE-ARM for a published model. `study.arms` lists them all.
"""
