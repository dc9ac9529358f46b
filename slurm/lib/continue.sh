# Going on when the time is up: sourced by common.sh. The host does it: in a container there is no scontrol.
#
#   HPCKV_CONTINUE               requeue, chain (this job submits the next one) or none
#   HPCKV_ATTEMPTS               so many starts at most (20)
#   HPCKV_MAX_ELAPSED            time of all starts together, as Slurm writes it: minutes, hours:minutes:seconds, days-hours
#   HPCKV_MAX_POINTS             points of all starts together, each node costing HPCKV_POINTS_PER_NODE_HOUR
#
# Every start leaves a file, so that nodes need not append to one: its first line when it begins (start JOB SECONDS NODES LIMIT ANSWERS), its
# last when it ends (end JOB SECONDS CODE NEXT). NEXT is requeue or chain, stop if nothing goes on by itself, or ended: from outside, and
# whether the job starts again only Slurm knows. They lie in hpckv_folder or in HPCKV_RUN_DIR; without either in the directory that the run
# names in the file HPCKV_BEGINNING, from the end of the first start on. Of `hpckv run` only: what else is run here has no answers to count.

# Seconds of a time as Slurm writes it.
hpckv_seconds() {
    local days=0 text=$1 a b c
    [[ $text =~ ^([0-9]+-)?[0-9]+(:[0-9]+)?(:[0-9]+)?$ ]] || return
    [[ $text != *-* ]] || days=${text%%-*}
    IFS=: read -r a b c <<<"${text##*-}"
    if [[ $text == *-* || -n $c ]]; then
        echo $(((10#$days * 24 + 10#$a) * 3600 + 10#${b:-0} * 60 + 10#${c:-0}))
    else
        echo $((10#$a * 60 + 10#${b:-0}))
    fi
}

hpckv_check_settings() {
    local name value
    case ${HPCKV_CONTINUE:-none} in
    requeue | chain | none) ;;
    *)
        hpckv_say "HPCKV_CONTINUE=$HPCKV_CONTINUE is none of requeue, chain, none"
        return 64
        ;;
    esac
    if ! [[ ${HPCKV_ATTEMPTS:-20} =~ ^[0-9]+$ ]]; then
        hpckv_say "HPCKV_ATTEMPTS=$HPCKV_ATTEMPTS is not a number"
        return 64
    fi
    # A chain's later jobs would not know that they are.
    if [ "${HPCKV_CONTINUE:-}" = chain ] && [ -z "${hpckv_folder:-}" ] && [[ ${SLURM_EXPORT_ENV:-ALL} != ALL* ]]; then
        hpckv_say "HPCKV_CONTINUE=chain needs sbatch --export=ALL, which is the default"
        return 64
    fi
    hpckv_is_run || return 0
    for name in HPCKV_MAX_POINTS HPCKV_POINTS_PER_NODE_HOUR; do
        value=${!name:-1}
        if ! [[ $value =~ ^[0-9]*[.]?[0-9]+$ && $value =~ [1-9] ]]; then
            hpckv_say "$name=$value is not a number above 0"
            return 64
        fi
    done
    if [ -n "${HPCKV_MAX_ELAPSED:-}" ] && [ -z "$(hpckv_seconds "$HPCKV_MAX_ELAPSED")" ]; then
        hpckv_say "HPCKV_MAX_ELAPSED=$HPCKV_MAX_ELAPSED is no time as Slurm writes it, for example 1-12:00:00"
        return 64
    fi
    if [ -n "${HPCKV_MAX_POINTS:-}" ] && [ -z "${HPCKV_POINTS_PER_NODE_HOUR:-}" ]; then
        hpckv_say "HPCKV_MAX_POINTS needs HPCKV_POINTS_PER_NODE_HOUR"
        return 64
    fi
    if [ -n "${HPCKV_MAX_POINTS:-}${HPCKV_MAX_ELAPSED:-}" ] && [ -z "${hpckv_folder:-}${HPCKV_RUN_DIR:-}" ]; then
        hpckv_say "HPCKV_MAX_ELAPSED and HPCKV_MAX_POINTS need HPCKV_RUN_DIR, to remember what was used"
        return 64
    fi
}

# Not of a run are the settings that a site makes for all scripts: its directory, and what it may cost.
hpckv_is_run() {
    # shellcheck disable=SC2154 # common.sh has it
    [ "$hpckv_verb" = run ]
}

# Complete answers so far, also those that jobs working together have not merged yet.
hpckv_answers() {
    [ -n "$hpckv_run_dir" ] || { echo 0; return; }
    cat "$hpckv_run_dir/output.jsonl" "$hpckv_run_dir"/queue/*/parts/*.jsonl 2>/dev/null | wc -l
}

# Notes this start; the first thing a job does. A run that is finished ends here, and one that may not go on.
hpckv_begin() {
    hpckv_first=${HPCKV_FIRST_JOB:-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}
    hpckv_attempt=$((${HPCKV_ATTEMPT:-1} + ${SLURM_RESTART_COUNT:-0}))
    hpckv_pool=${HPCKV_POOL:-}
    unset HPCKV_FIRST_JOB HPCKV_ATTEMPT HPCKV_POOL # a job that is submitted from this one begins anew
    hpckv_starts='' hpckv_run_dir=''
    hpckv_task=${hpckv_pool:+$hpckv_first-}${SLURM_ARRAY_TASK_ID:-0}
    hpckv_is_run || return 0
    hpckv_run_dir=${HPCKV_RUN_DIR:-}
    if [ -n "${hpckv_folder:-}" ]; then
        hpckv_starts=$hpckv_folder/starts
        hpckv_find_pickle
    elif [ -n "$hpckv_run_dir" ]; then
        hpckv_starts=$hpckv_run_dir/logs/starts-of-${hpckv_pool:-$hpckv_first}
    else
        hpckv_expect_beginning
        return 0
    fi
    mkdir -p -- "$hpckv_starts" || return 73
    local files
    files=("$hpckv_starts/$hpckv_task".*)
    [ -e "${files[0]}" ] || files=()
    hpckv_attempt=$((${#files[@]} + 1))
    hpckv_start=$hpckv_starts/$hpckv_task.$(printf '%05d' "$hpckv_attempt").$SLURM_JOB_ID
    if [ "${#files[@]}" -gt 0 ] && grep -qsE '^end [0-9]+ [0-9]+ [03] ' "${files[@]}"; then
        hpckv_say "the run is finished; nothing to do"
        return 100
    fi
    hpckv_note_start "$(date +%s)" "$(hpckv_answers)" || return 73
    if [ "$(hpckv_budget left)" = 0 ]; then
        hpckv_end 75 "$(hpckv_spent)"
    fi
}

# hpckv_note_start SECONDS ANSWERS: the first word.
hpckv_note_start() {
    echo "start $SLURM_JOB_ID $1 ${SLURM_JOB_NUM_NODES:-1} ${SLURM_JOB_END_TIME:-0} $2" >"$hpckv_start"
}

# Where the script is not told the run directory, the run tells it: its first words are how many answers were there, and where.
hpckv_expect_beginning() {
    hpckv_began=$(date +%s)
    HPCKV_BEGINNING=$(mktemp 2>/dev/null || mktemp -p /tmp) && export HPCKV_BEGINNING
}

# Notes the start when it is over, to be compared with the next. In an image the directory may be called otherwise: nothing is noted then.
hpckv_learn_beginning() {
    local answers
    [ -n "${HPCKV_BEGINNING:-}" ] || return 0
    read -r answers hpckv_run_dir <"$HPCKV_BEGINNING"
    rm -f "$HPCKV_BEGINNING"
    unset HPCKV_BEGINNING
    [ -n "$hpckv_run_dir" ] && [ -d "$hpckv_run_dir" ] || return 0
    hpckv_starts=$hpckv_run_dir/logs/starts-of-${hpckv_pool:-$hpckv_first}
    hpckv_start=$hpckv_starts/$hpckv_task.$(printf '%05d' "$hpckv_attempt").$SLURM_JOB_ID
    mkdir -p -- "$hpckv_starts" && hpckv_note_start "$hpckv_began" "$answers" || hpckv_start='' hpckv_starts=''
}

# Ends the script with the code of a check that failed: 100 says that there is nothing to do.
hpckv_exit() {
    local code=$?
    [ "$code" -ne 100 ] || exit 0
    hpckv_end "$code"
}

# hpckv_end CODE [WHY]: the last word of a start.
hpckv_end() {
    [ -z "${2:-}" ] || hpckv_say "$2"
    hpckv_note_end "$1" stop
    exit "$1"
}

# hpckv_end_outside CODE: the last word of a start that scancel, a requeue or a job of more worth has ended.
hpckv_end_outside() {
    [ "$1" -ne 75 ] || hpckv_say "ended from outside; requests are left, and the next start goes on from here"
    hpckv_note_end "$1" ended
    exit "$1"
}

hpckv_note_end() {
    [ -z "${hpckv_start:-}" ] || echo "end $SLURM_JOB_ID $(date +%s) $1 $2" >>"$hpckv_start"
    hpckv_comment
}

# What the run says of itself becomes the job's comment, for `sacct -o JobID,Comment%80`. Whoever gave the job one keeps it. It fails without a
# word where the site forbids it, and takes a few seconds at most where Slurm does not answer.
hpckv_comment() {
    local shown
    [ -n "$hpckv_said" ] || return 0
    # shellcheck disable=SC2154 # common.sh has it
    shown=$(timeout -k 1 5 scontrol --oneliner show job "$hpckv_job" 2>/dev/null) || return 0
    case $shown in
    *' Comment=hpckv '*) ;;
    *' Comment='*) return 0 ;;
    esac
    timeout -k 1 5 scontrol update "JobId=$hpckv_job" "Comment=$hpckv_said" >/dev/null 2>&1
    return 0
}

# submitit looks for its pickle by this job's number, which a task of an array, and a job that goes on, do not share.
hpckv_find_pickle() {
    [ -z "${SLURM_ARRAY_JOB_ID:-}" ] ||
        ln -s "${SLURM_ARRAY_JOB_ID}_submitted.pkl" "$hpckv_folder/${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}_submitted.pkl" 2>/dev/null
    return 0
}

# hpckv_budget seconds|points|left: used by all starts together, and the seconds this one may go on if all that run now go on as well; left is
# empty without a limit.
hpckv_budget() {
    [ -n "$hpckv_starts" ] || return 0
    awk -v what="$1" -v now="$(date +%s)" \
        -v max_s="$([ -z "${HPCKV_MAX_ELAPSED:-}" ] || hpckv_seconds "$HPCKV_MAX_ELAPSED")" \
        -v max_points="${HPCKV_MAX_POINTS:-}" -v rate="${HPCKV_POINTS_PER_NODE_HOUR:-0}" '
        # One that was killed left no end. It went on until the same job began again, or to its limit, or goes on still.
        function add(job, until) {
            if (limit[job] && until > limit[job]) until = limit[job]
            used += until - begun[job]
            node_s += (until - begun[job]) * nodes[job]
            delete begun[job]
        }
        function rounded_up(x) { return (x < 0) ? 0 : int(x) + (x > int(x)) } # 0 is nothing left
        $1 == "start" {
            if ($2 in begun) add($2, $3)
            begun[$2] = $3; nodes[$2] = $4; limit[$2] = $5
        }
        $1 == "end" && $2 in begun { limit[$2] = 0; add($2, $3) }
        END {
            for (job in begun) {
                if (!limit[job] || now < limit[job]) { running++; nodes_running += nodes[job] }
                add(job, now)
            }
            if (max_s != "") left = (max_s - used) / (running ? running : 1)
            if (max_points != "") {
                more = (max_points / rate * 3600 - node_s) / (nodes_running ? nodes_running : 1)
                if (max_s == "" || more < left) left = more
            }
            if (what == "seconds") printf "%d\n", used
            if (what == "points") printf "%.3f\n", node_s / 3600 * rate
            if (what == "left" && max_s max_points != "") printf "%d\n", rounded_up(left)
        }' "$hpckv_starts"/*
}

hpckv_spent() {
    local used=''
    [ -z "${HPCKV_MAX_ELAPSED:-}" ] || used="$(hpckv_budget seconds) s of HPCKV_MAX_ELAPSED=$HPCKV_MAX_ELAPSED"
    [ -z "${HPCKV_MAX_POINTS:-}" ] || used="${used:+$used and }$(hpckv_budget points) of HPCKV_MAX_POINTS=$HPCKV_MAX_POINTS"
    echo "requests are left, and what they may cost is spent: $used; not going on"
}

# When what may be spent is spent, the run is told to stop as if its time were up. Looked at once a minute: other starts begin and end.
hpckv_start_budget() {
    hpckv_timer=''
    [ -n "$(hpckv_budget left)" ] || return 0
    (
        trap - USR1 USR2 TERM INT
        while left=$(hpckv_budget left); [ "$left" != 0 ]; do
            [ "${left:-60}" -lt "${hpckv_look_s:=60}" ] || left=$hpckv_look_s
            read -rt "$left" <> <(:) # a program of its own to sleep would outlive the subshell
        done
        kill -USR1 "$$"
    ) 2>/dev/null &
    hpckv_timer=$!
    disown "$hpckv_timer" # bash would say that it was killed
}

hpckv_stop_budget() {
    [ -z "$hpckv_timer" ] || kill "$hpckv_timer" 2>/dev/null
}

# Whether this start and the one before gave no new answer.
hpckv_stands_still() {
    local before answers
    [ -n "$hpckv_starts" ] || return 1
    answers=$(hpckv_answers)
    # Of this array task: the last two starts.
    before=$(cat "$hpckv_starts/$hpckv_task".* | awk '$1 == "start" { print $6 }' | tail -n 2)
    [ "$(wc -l <<<"$before")" -eq 2 ] && [ "$(sort -nu <<<"$before")" = "$answers" ]
}

# 75: requests are left, and the same command goes on from there.
hpckv_continue() {
    local how=${HPCKV_CONTINUE:-none} most=${HPCKV_ATTEMPTS:-20}
    if [ "$how" = none ]; then
        hpckv_end 75 "requests are left; sbatch the same script again to go on"
    elif [ "$hpckv_attempt" -ge "$most" ]; then
        hpckv_end 75 "requests are left after $hpckv_attempt starts; not going on (HPCKV_ATTEMPTS)"
    elif hpckv_stands_still; then
        hpckv_end 75 "two starts in a row gave no new answer; not going on"
    elif [ "$(hpckv_budget left)" = 0 ]; then
        hpckv_end 75 "$(hpckv_spent)"
    elif [ "$how" = requeue ]; then
        hpckv_requeue
    else
        hpckv_chain
    fi
}

# hpckv_ask COMMAND...: whether Slurm did it; what it said is in hpckv_answer. Where its controller does not answer it is asked again, more and
# more seldom, until shortly before the end of this start's time, and for no more than a quarter of an hour: the node waits meanwhile.
hpckv_ask() {
    local pause=1 code until=$(($(date +%s) + 900))
    if [ "${SLURM_JOB_END_TIME:-0}" -gt 0 ] && [ $((SLURM_JOB_END_TIME - 10)) -lt "$until" ]; then
        until=$((SLURM_JOB_END_TIME - 10))
    fi
    for ((hpckv_asked = 0; ; hpckv_asked++)); do
        hpckv_answer=$("$@" 2>&1)
        code=$?
        case $code:$hpckv_answer in
        0:*) return ;;
        # The first two are of `timeout`.
        124:* | 137:* | *'Unable to contact'* | *onnection\ refused* | *onnect\ fail* | *imed\ out* | *'in standby'* | *'not responding'* | \
            *'temporarily un'*) ;;
        *) return "$code" ;;
        esac
        hpckv_answer=${hpckv_answer:-no answer}
        [ $(($(date +%s) + pause)) -lt "$until" ] || return "$code"
        hpckv_say "${hpckv_answer##*$'\n'}; Slurm is asked again in $pause s"
        sleep "$pause" &
        wait "$!" || kill "$!" 2>/dev/null # a trap interrupts it
        [ -z "$hpckv_ended" ] || return "$code"
        [ "$pause" -ge 60 ] || pause=$((pause * 2))
    done
}

hpckv_requeue() {
    hpckv_say "requests are left; requeued (start $hpckv_attempt of at most ${HPCKV_ATTEMPTS:-20})"
    hpckv_note_end 75 requeue
    trap '' USR1 USR2
    trap - TERM INT # Slurm ends this start
    # A job that is pending is one that Slurm itself has requeued: for a job of more worth, say.
    if hpckv_ask timeout -k 1 20 scontrol requeue "$hpckv_job" || [[ $hpckv_answer == *@(is|already)\ pending* ]]; then
        sleep 60
        exit 75
    fi
    if [[ $hpckv_answer == *@(presently|equeue*)\ disabled* ]]; then
        hpckv_end 75 "this job may not be requeued ($hpckv_answer); HPCKV_CONTINUE=chain submits another instead"
    fi
    hpckv_end 75 "not requeued ($hpckv_answer); the same command again goes on from here"
}

# What is asked again may have been heard the first time: the job that was submitted then, by the script that it runs, which is this job's alone.
hpckv_find_next() {
    [ "$hpckv_asked" -gt 0 ] || return
    timeout -k 1 20 squeue -h -u "$(id -u)" -t PENDING -o '%A %o' 2>/dev/null |
        script=$0 awk '!found && index($0, $1 " " ENVIRON["script"]) == 1 { found = $1 } END { if (found) print found; exit !found }'
}

# Of this job only what sbatch itself is to know: its variables would pin the next one to this one's resources.
hpckv_submit_next() (
    options=(--parsable --dependency="afterany:$SLURM_JOB_ID")
    [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || options+=(--array="$SLURM_ARRAY_TASK_ID")
    hpckv_find_next && return
    for name in $(compgen -e | grep -E '^(SLURM|SBATCH|SRUN|PMI|PMIX|OMPI)' | grep -vx SLURM_CONF); do unset "$name"; done
    unset hpckv_in_job
    hpckv_load_site || exit # what it has for sbatch
    export HPCKV_ATTEMPT=$((hpckv_attempt + 1)) HPCKV_FIRST_JOB=$hpckv_first HPCKV_POOL=$hpckv_pool
    # shellcheck disable=SC2154 # common.sh has it
    timeout -k 1 30 sbatch "${options[@]}" "${hpckv_submit[@]}"
)

hpckv_chain() {
    local next
    hpckv_ask hpckv_submit_next || {
        [ -z "$hpckv_ended" ] || hpckv_end_outside 75
        hpckv_end 75 "the next job cannot be submitted ($hpckv_answer); the same command again goes on from here"
    }
    grep -vE '^[0-9]+(;.*)?$' <<<"$hpckv_answer" >&2 # warnings
    next=$(grep -E '^[0-9]+(;.*)?$' <<<"$hpckv_answer" | tail -n 1)
    next=${next%%;*}
    if [ -n "${hpckv_folder:-}" ]; then
        ln -s "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}_submitted.pkl" "$hpckv_folder/${next}_submitted.pkl"
        echo "$next" >>"$hpckv_folder/jobs"
    fi
    hpckv_say "requests are left; job $next goes on (start $((hpckv_attempt + 1)) of at most ${HPCKV_ATTEMPTS:-20})"
    hpckv_note_end 75 chain
    exit 0
}
