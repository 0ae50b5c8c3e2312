#!/usr/bin/env bash
# Runs a command again for as long as it ends by the exit code that asks for it (75, or $AGAIN):
#
#   examples/preemptible/run-until-done.sh python examples/preemptible/train.py
#
# Every other code ends the loop and is handed on: 0 is done, 1 is Ctrl+C or an error.
set -u
again=${AGAIN:-75}

while true; do
  "$@"
  code=$?
  [ "$code" -eq "$again" ] || exit "$code"
  echo "$(date '+%H:%M:%S') taken away: starting again"
done
