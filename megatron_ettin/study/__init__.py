"""Study: siblings trained on the same rows, evaluated on the same tasks, shown on one page.

Folders and files of a study, below its `output`:

    runs/SIZE/ARM/seed_N/   run of the training: metrics.jsonl, ledger, checkpoints
    models/MODEL/           its last checkpoint as a Hugging Face folder
    results/MODEL/TASK/     results of the evaluation (`evaluation.results`)
    series/MODEL.json       checkpoints that were evaluated: step, tokens, name of the model
    series/MODEL-step_N/TASK/   results on these checkpoints
    proof.json              proof that the arms saw the same rows (`study.proof`)
    stages/STAGE.json       when a stage ran; STAGE.log beside it is what it printed
    page/                   the page

MODEL is SIZE-ARM-seed_N, or SIZE-ARM for a published model. `study.arms` lists them all.
"""
