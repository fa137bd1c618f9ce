# What the templates beside have in common: start a run, save it before the time limit, and go on with it in a new job.
#
# Slurm sends SIGUSR1 to the batch script (#SBATCH --signal=B:USR1@SECONDS). The script makes the file RUN/stop, on which
# the run saves a checkpoint and ends; then the job is requeued, and goes on from there with --resume auto. That works
# under every launcher, where a signal to the ranks would reach them through launchers that kill what is not gone in 30 s.
# A run that failed (a lost node, say) is requeued too, MAX_RESTARTS times at most; a mistake in its settings is not.

MAX_RESTARTS=${MAX_RESTARTS:-3}
asked=

# The value of an option of launch/train.py: option --run.dir "$@"
option() {
    local name=$1 value=
    shift
    while [ $# -gt 0 ]; do
        case $1 in
            "$name") value=${2:-} ;;
            "$name="*) value=${1#*=} ;;
        esac
        shift
    done
    echo "$value"
}

state_of() { sed -n 's/.*"state": "\([a-z]*\)".*/\1/p' "$1/status.json" 2>/dev/null; }

ask_to_stop() {
    asked=1
    echo "$(date '+%F %T') the time limit comes near: asking $run to save and stop"
    if [ -d "$run" ]; then touch "$run/stop"; else kill "$child"; fi
}

# Run a command in the background, so that the signal is acted on at once; its exit code.
watched() {
    "$@" &
    child=$!
    trap ask_to_stop USR1
    local code=0
    while true; do
        wait "$child" && code=0 || code=$?
        kill -0 "$child" 2>/dev/null || break # wait also returns when a signal came
    done
    return "$code"
}

# requeue_or_leave CODE: what becomes of the job after the run has ended with CODE.
requeue_or_leave() {
    local code=$1 state
    state=$(state_of "$run")
    echo "$(date '+%F %T') exit code $code, $run is ${state:-not there}"
    if [ "$state" = finished ] || [ "$code" = 2 ]; then exit "$code"; fi
    # A mistake ends every rank with 2, but srun kills the slower ones and reports their signal: a run that never began stays.
    if [ -z "$state" ] && [ -z "$asked" ]; then exit "$code"; fi
    if [ -z "$asked" ] && [ "${SLURM_RESTART_COUNT:-0}" -ge "$MAX_RESTARTS" ]; then
        echo "restarted $MAX_RESTARTS times already; leaving it"
        exit "$code"
    fi
    echo "requeueing job $SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60 # scontrol ends this script
    exit "$code"
}
