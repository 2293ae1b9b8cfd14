// Browsers refuse workers in pages that are opened from disk. The theme runs its search in one, so replace it by a frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      this.window = new Promise((resolve) => {
        frame.onload = () => {
          const inner = frame.contentWindow
          inner.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
          const script = frame.contentDocument.createElement("script")
          script.onload = () => resolve(inner)
          script.src = url
          frame.contentDocument.head.append(script)
        }
      })
      frame.hidden = true
      frame.srcdoc = "<!doctype html>"
      document.body.append(frame)
    }

    async postMessage(data) {
      (await this.window).dispatchEvent(new MessageEvent("message", { data }))
    }
  }
}
