"""Programs `sbatch`, `srun` and `scontrol` that run jobs at once, one after the other."""

from pathlib import Path

SBATCH = r"""#!/usr/bin/env python3
import os, re, subprocess, sys
from pathlib import Path

jobs = Path(__file__).parent / "jobs"
script, text = sys.argv[-1], open(sys.argv[-1]).read()
settings = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.M))
settings |= dict(re.findall(r"^--([\w-]+)=(.*)$", "\n".join(sys.argv[1:-1]), re.M))
exports = dict(re.findall(r"(\w+)=(\w+)", settings.get("export", "")))
number = str(len(list(jobs.iterdir())) + 1)
copy = jobs / number
copy.write_text(text)
first, last = map(int, settings["array"].split("%")[0].split("-"))
depends = re.findall(r"afterok:(\d+)", settings.get("dependency", ""))
failed = any((jobs / each).read_text().endswith("# failed\n") for each in depends)
for task in range(first, last + 1):
    if failed:
        break
    job = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_JOB_ID": number, "SLURM_NODELIST": "here"}
    output = settings["output"].replace("%A", number).replace("%a", str(task))
    with open(output, "w") as file:
        environment = {**os.environ, **exports, **job}
        done = subprocess.run(["bash", script], stdout=file, stderr=file, env=environment)
    if done.returncode:
        with copy.open("a") as file:
            file.write("# failed\n")
if failed:
    with copy.open("a") as file:
        file.write("# never ran\n# failed\n")
print("Submitted batch job", number)
"""
SRUN = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do
  [[ $1 == -n ]] && shift
  shift
done
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
[[ "$1 $2" == "show hostnames" ]] && echo "$3"
"""


def install(folder: Path) -> Path:
    """Write the programs; return the folder in which the scripts of jobs are kept, by number."""
    folder.mkdir()
    for name, content in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(content)
        (folder / name).chmod(0o755)
    jobs = folder / "jobs"
    jobs.mkdir()
    return jobs
