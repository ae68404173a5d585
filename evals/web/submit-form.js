// The dialog that queues tasks on a checkpoint; its last button says what will happen.

import { field, h, integer, naturally, setOptions } from "./dom.js";
import { compareTasks } from "./scalars.js";
import { store } from "./store.js";

export class SubmitForm {
  /** `submit` gets { run, step (null: the newest), tasks, priority }. */
  constructor(submit) {
    this.run = h("select", { required: true, on: { change: () => this.#sync() } });
    this.step = h("select", { on: { change: () => this.#sync() } });
    this.priority = h("input", { type: "number", value: "1", min: "-100", max: "100", step: "1" });
    this.tasks = h("div", { class: "checks" });
    this.tasks.addEventListener("change", () => this.#sync());
    this.go = h("button", { class: "primary" });
    const back = h("button", { type: "button", on: { click: () => this.dialog.close() } }, "Back");
    const form = h("form", null, h("h2", { id: "submit-title" }, "Submit"),
      h("div", { class: "controls" }, field("Run", this.run), field("Step", this.step), field("Priority", this.priority)),
      h("fieldset", null, h("legend", null, "Tasks"), this.tasks),
      h("p", { class: "hint" }, "A task that has a result for this checkpoint and these settings is not run again. Higher priorities go first."),
      h("p", { class: "buttons" }, back, this.go));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.dialog.close();
      submit(this.#wanted());
    });
    this.dialog = h("dialog", { "aria-labelledby": "submit-title", class: "wide" }, form);
  }

  /** Show it with the runs and tasks of the service. */
  open() {
    const runs = Object.keys(store.listing.runs).sort(naturally);
    const models = store.listing.baselines.map((name) => [name, name, "baselines"]);
    setOptions(this.run, [...runs.map((name) => [name, name]), ...models], this.run.value || (runs[0] ?? models[0]?.[0] ?? ""));
    const names = [...store.listing.tasks].sort(compareTasks);
    if (this.tasks.dataset.names !== String(names)) {
      this.tasks.replaceChildren(...names.map((name) => h("label", { class: "box" }, h("input", { type: "checkbox", value: name }), name)));
      this.tasks.dataset.names = String(names);
    }
    this.#sync();
    this.dialog.showModal();
  }

  #wanted() {
    const tasks = [...this.tasks.querySelectorAll("input:checked")].map((box) => box.value);
    return { run: this.run.value, step: this.step.value === "" ? null : Number(this.step.value), tasks, priority: Number(this.priority.value) };
  }

  #sync() {
    const steps = [...(store.listing.runs[this.run.value]?.steps ?? [])].sort((a, b) => b - a);
    const chosen = steps.includes(Number(this.step.value)) && this.step.value !== "" ? this.step.value : "";
    const isModel = store.listing.baselines.includes(this.run.value);
    setOptions(this.step, [["", isModel ? "none" : "the newest"], ...steps.map((step) => [step, integer(step)])], chosen);
    const { run, step, tasks } = this.#wanted();
    this.go.disabled = !tasks.length || !run || !(steps.length || isModel);
    const where = isModel ? run : `${run}, ${step === null ? "newest step" : `step ${integer(step)}`}`;
    this.go.textContent = tasks.length ? `Queue ${tasks.length} on ${where}` : "Choose tasks";
  }
}
