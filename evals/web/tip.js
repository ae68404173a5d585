// The read-out that follows the pointer or the focus, and the lines that appear for a moment below.

const tip = document.getElementById("tip");
const toast = document.getElementById("toast");
let timer;

/** Show nodes beside a rectangle of the window, where there is room for them. */
export function showTip(near, ...content) {
  tip.replaceChildren(...content.filter(Boolean));
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, near.left), document.documentElement.clientWidth - width - 8);
  const below = near.bottom + 6;
  const top = below + height > window.innerHeight - 4 ? near.top - height - 6 : below;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${Math.max(4, top)}px`;
}

/** Take it away. */
export function hideTip() {
  tip.hidden = true;
}

/** Say something for some seconds; errors stay longer. */
export function say(text, { error = false } = {}) {
  clearTimeout(timer);
  toast.textContent = text;
  toast.classList.toggle("error", error);
  toast.hidden = false;
  timer = setTimeout(() => {
    toast.hidden = true;
  }, error ? 12_000 : 5000);
}

/** Ask before something is done; true when it shall be. */
export function confirmed({ title, text, yes, danger = false }) {
  const dialog = document.getElementById("confirm");
  const button = document.getElementById("confirm-yes");
  document.getElementById("confirm-title").textContent = title;
  document.getElementById("confirm-text").textContent = text;
  button.textContent = yes;
  button.classList.toggle("danger", danger);
  return new Promise((resolve) => {
    let answer = false;
    document.getElementById("confirm-no").onclick = () => dialog.close();
    dialog.querySelector("form").onsubmit = (event) => {
      event.preventDefault();
      answer = true;
      dialog.close();
    };
    dialog.onclose = () => resolve(answer);
    dialog.showModal();
  });
}

window.addEventListener("scroll", hideTip, { capture: true, passive: true });
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hideTip();
});
