// What both views do alike: keep the end in sight, fit a box to its text, count the seconds of a wait.

import { count } from "./figures.js";

/** Change what a scrolled view holds; if its end was in sight, keep it there. */
export function following(view, change) {
  const atEnd = view.scrollHeight - view.scrollTop - view.clientHeight < 60;
  change();
  if (atEnd) view.scrollTop = view.scrollHeight;
}

/** Make a box of text as high as its text. */
export function fit(box) {
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`;
}

/** Show in a turn how long it has waited; returns the timer to clear. */
export function showWaiting(turn) {
  const started = performance.now();
  return setInterval(() => {
    const seconds = count.format((performance.now() - started) / 1000);
    turn.querySelector("[data-field='waited']").textContent = ` for ${seconds} s`;
  }, 1000);
}
